"""Fuzz targets: a plain function for each parser, and a driver that feeds them mutated seeds (`fuzz.run`)."""
