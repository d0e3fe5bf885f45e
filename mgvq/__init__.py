"""Vector quantisation of vision-language models, as controlled and seeded experiments."""
