"""The command ``python -m lightning_noise``, which runs the demonstration."""

import sys

if __name__ == "__main__":
    try:
        from lightning_noise.demo.main import main
    except ModuleNotFoundError as error:
        sys.exit(f'lightning_noise: the demonstration needs {error.name}: pip install "lightning_noise[demo]"')
    main()
