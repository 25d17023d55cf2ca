"""python -m mcpo_jax VERB ..."""

from mcpo_jax import main

main.main()
