"""The simulated accelerator: see device.py for tests in this process, build.environment() for child processes."""
