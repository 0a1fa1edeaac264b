"""Parameters of official files, buffers left out, by family and size: what no class can tell about itself.

Keys and shapes follow from the classes (``vargen.checkpoints.manifests``); these counts, from papers and official
registries, guard both. Sizes stand with the families (``vargen.backbones``).
"""

from __future__ import annotations

from typing import Any

PARAMETERS: dict[str, dict[Any, int]] = {
    "llamagen-c2i": {
        "B": 110_888_448,
        "L": 342_910_976,
        "XL": 774_699_520,
        "XXL": 1_410_972_672,
        "XXXL": 3_893_027_840,
        "1B": 1_199_616_000,
        "3B": 3_096_659_200,
        "7B": 6_614_589_440,
    },
    "llamagen-t2i": {
        "B": 112_282_368,
        "L": 345_031_680,
        "XL": 777_678_080,
        "XXL": 1_414_940_160,
        "XXXL": 3_902_261_760,
        "1B": 1_205_954_560,
        "3B": 3_110_249_600,
        "7B": 6_635_655_168,
    },
    "nar": {
        "B": 130_551_552,
        "M": 295_453_696,
        "L": 372_536_320,
        "XL": 815_991_040,
        "XXL": 1_464_454_656,
    },
    "nar-t2i": {
        "B": 131_945_472,
        "M": 297_574_400,
        "L": 374_657_024,
        "XL": 818_969_600,
        "XXL": 1_468_422_144,
    },
    "nar-video": {
        "abs-S": 37_800_192,
        "abs-B": 125_145_600,
        "abs-L": 368_736_256,
        "abs-LP": 693_588_480,
        "abs-XL": 815_500_800,
    },
    "par": {  # (size, codes of a group)
        ("L", 4): 342_914_048,
        ("XL", 4): 774_703_360,
        ("XXL", 4): 1_410_977_280,
        ("3B", 4): 3_096_668_800,
        ("3B", 16): 3_096_707_200,
    },
    "randar": {"L": 342_912_000, "XL": 774_700_800},
    "var": {  # d12 was never released
        "d12": 133_186_960,
        "d16": 310_283_520,
        "d20": 600_917_136,
        "d24": 1_033_399_360,
        "d30": 2_010_020_356,
        "d36": 2_353_893_904,
    },
    "infinity": {  # those called layer* were never released
        "2b": 2_204_564_032,
        "8b": 8_375_791_824,
        "layer12": 125_148_800,
        "layer16": 361_578_464,
        "layer24": 940_871_072,
        "layer32": 2_256_595_040,
        "layer40": 4_716_292_832,
        "layer48": 8_767_037_216,
    },
    "switti": {  # the AR models have the same tensors
        "512": 2_470_518_256,
        "1024": 2_470_525_936,
    },
    "mar": {"base": 207_924_768, "large": 478_326_304, "huge": 942_403_104},
    "xar": {"B": 172_638_224, "L": 608_397_968, "H": 1_186_024_096},
    # without the tokenizer in the files; the paper rounds, and leaves out embeddings and head: 0.7, 1.2 and 3 billion
    "nbp": {"XL": 982_785_024, "XXL": 1_612_369_920, "3B": 4_230_813_696},  # UCF-101, text in the vocabulary
    "nbp-frames": {"XL": 884_431_872, "XXL": 1_481_232_384, "3B": 4_034_107_392},  # Kinetics-600, frame prediction
    "llamagen-vq": {"VQ-16": 71_883_403, "VQ-8": 70_109_835},
    "var-vqvae": {"vae_ch160v4096z32": 108_948_355},
    "infinity-vae": {
        "d14": 81_624_209,
        "d16": 109_970_579,
        "d24": 110_044_315,
        "d32": 110_118_051,
        "d64": 110_412_995,
    },
    "kl-autoencoder": {"kl16": 66_456_019},
    "nbp-tokenizer": {"MAGVIT-v2": 370_372_105},
    "janus-original": {"1.3B": 2_089_232_011, "7B": 7_420_368_523},  # the former Janus-Pro-1B too
    "emu3-original": {"8B": 8_492_011_520},  # without the vision tokenizer
    "emu3-vision-tokenizer": {"Emu3-VisionTokenizer": 270_740_287},
}
