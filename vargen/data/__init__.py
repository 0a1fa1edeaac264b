"""Data sets: pixel heroes composed without end from a small atlas of named parts.

Import from the modules (`vargen.data.heroes`, `vargen.data.crawl`). Nothing here imports torch until
`vargen.data.heroes.HeroesDataset` is asked for.
"""
