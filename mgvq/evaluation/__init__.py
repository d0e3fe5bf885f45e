"""Evaluation: lmms-eval in process for generated answers, and teacher-forced loss and KL beside it."""
