"""Calibration and evaluation samples: where they come from and how they become inputs."""
