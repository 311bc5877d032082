"""popi_jax: personalised language models with POPI (arXiv 2510.17881) in JAX."""
