"""The steps of `bench/gpu.py`: a module each with ``run(settings, emit)``, started as ``python -m bench.gpu_steps``."""
