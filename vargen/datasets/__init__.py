"""Data sets: pixel heroes composed without end from a small atlas of named parts.

Import from the modules (`vargen.datasets.heroes.compose`, `vargen.datasets.heroes.build_atlas`). Nothing here imports torch until
`vargen.datasets.heroes.compose.HeroesDataset` is asked for.
"""
