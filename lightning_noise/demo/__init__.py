"""The demonstration: a classifier of real images, trained without and with noise and evaluated under noise."""
