"""Statistics: tests of significance, intervals, variance components, power."""
