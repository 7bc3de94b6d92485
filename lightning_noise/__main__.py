"""`python -m lightning_noise`: the demonstration."""

from lightning_noise.demo.__main__ import main

if __name__ == "__main__":
    main()
