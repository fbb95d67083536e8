"""Predicts memory and time of a step from a model's numbers, a layout and a GPU's data sheet, and ranks layouts.

Pure functions of numbers: nothing here starts a process, reads a weight or asks for a device. The formulas are explained in docs/scaling.md.
"""
