"""What is known about operators, as tables."""
