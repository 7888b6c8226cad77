"""The commands of ``dpnp-reconstruct``, a module each: its options and what it does."""
