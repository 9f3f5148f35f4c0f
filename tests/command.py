"""The command `dalle2` as arguments of Python, so that it needs no installed script."""

MAIN = ("-m", "dalle2_jax.cli.main")
