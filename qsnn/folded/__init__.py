"""The integer form of a spiking network."""
