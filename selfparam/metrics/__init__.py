"""Numbers that judge a model. Each file is one metric; none knows target sets, training and files."""
