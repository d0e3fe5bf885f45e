"""Bit-shift trellis codes: a sequence of weights as a walk through the states of a shift register, no table stored."""
