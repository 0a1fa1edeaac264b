"""Random windows for tests of verification, in which every kind of label and outcome occurs."""

import torch

from vargen.kernels.verify.verify import Draft, Label
from vargen.kernels.warp import warp_logits

NEG = float("-inf")


def scene(num_codes=63, batch=3, window=5, branches=2, seed=0, dtype=torch.float32, **settings):
    """A window in which every kind of label, acceptance, rejection, end and single atom occurs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logits = normal(branches, batch, window, num_codes) * 2
    labels = normal(branches, batch, window + 1, num_codes) * 2
    row = torch.randint(window + 1, (batch, window), generator=generator)
    image = torch.arange(batch)[:, None]
    labels[:, image, row] = (
        logits + normal(branches, batch, window, num_codes) * 0.3
    )  # close distributions: some drafts pass
    labels[:, 0, row[0, 1]] = logits[:, 0, 1]  # p == q
    logits[:, -1, 0] = NEG  # a single atom
    logits[:, -1, 0, 3] = 1.0
    labels[:, -1, row[-1, 1], : num_codes // 2] = NEG  # nearly disjoint supports
    logits[:, -1, 1, num_codes // 2 + 1 :] = NEG
    logits, labels = logits.to(dtype), labels.to(dtype)
    kind = torch.randint(1, 4, (batch, window), generator=generator)
    kind[0, :2], kind[-1, :2] = Label.ROW, Label.ROW
    kind[:, -1] = Label.NONE
    distribution = (
        warp_logits(labels, **settings).softmax(-1)[image, row] if settings.get("temperature") != 0 else None
    )
    tokens = (logits[0].float() + normal(batch, window, num_codes)).argmax(-1)
    tokens[0, 1] = distribution[0, 1].argmax() if distribution is not None else tokens[0, 1]
    tokens[:, -1] = -1
    prob = torch.where(kind == Label.UNIFORM, 1 / num_codes, 1.0)
    if distribution is not None:
        prob = prob.where(kind != Label.ROW, distribution.gather(-1, tokens.clamp(min=0)[..., None])[..., 0])
    draft = Draft(tokens, kind.to(torch.int8), prob, row, labels)
    num_rows = torch.full((batch,), window)
    num_rows[1] = max(window - 2, 1)
    where = {
        "seeds": torch.randint(1 << 62, (batch,), generator=generator),
        "positions": torch.randint(500, (batch, 1), generator=generator) + torch.arange(window),
        "iteration": torch.randint(9, (batch,), generator=generator),
        "num_rows": num_rows,
    }
    return logits, draft, where


def assert_same(kernel, reference, num_rows, settings):
    assert torch.equal(kernel.tokens, reference.tokens)
    assert torch.equal(kernel.accepted, reference.accepted)
    assert torch.equal(kernel.num_committed, reference.num_committed)
    assert torch.allclose(kernel.prob, reference.prob, atol=1e-6)
    if settings.get("temperature") != 0:
        valid = torch.arange(reference.tokens.shape[1]) < num_rows[:, None]
        free = valid if "forced" not in settings else valid & (settings["forced"] < 0)
        low, high = kernel.stats[free][:, 0], reference.stats[free][:, 0]
        assert torch.equal(low, high) or (low - high).nan_to_num(0.0, 0.0, 0.0).abs().max() == 0
        assert torch.allclose(kernel.stats[free][:, 1], reference.stats[free][:, 1], atol=1e-5)
