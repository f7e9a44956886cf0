"""What things cost: kernels, layers, workers, environments, Ray, and devices that are not there."""
