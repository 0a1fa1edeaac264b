"""Second-edition classifiers: warm start from the first edition's. usage: classifier.py hero|motion STEPS OUT"""
import sys, time, json, torch
torch.set_num_threads(1)
from vargen.metrics._files import read_classifier
which, steps, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
t=time.time()
def log(step, loss):
    if step % 50 == 0: print(step, round(loss,4), round(time.time()-t), flush=True)
if which == "hero":
    from vargen.metrics import attributes as A

    from vargen.metrics.attribute_accuracy import accuracy_on_real_heroes
    state = read_classifier("runs/first/heroes32-classifier")[1]
    model = A.train_classifier(num_steps=steps, learning_rate=1e-3, seed=7, start=state, on_step=log)
    model.real_accuracy = accuracy_on_real_heroes(model)
else:
    from vargen.metrics import motion as M
    state = read_classifier("runs/first/heroes-video-classifier")[1]
    model = M.train_motion_classifier(num_steps=steps, seed=7, start=state, on_step=log)
    model.real_accuracy = M.real_accuracy(model)
model.save_pretrained(out)
print(model.real_accuracy)
