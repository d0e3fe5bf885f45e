"""A score for every input channel of every layer: how much the loss grows when the channel is quantised coarsely."""
