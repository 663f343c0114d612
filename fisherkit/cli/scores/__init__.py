"""``fisherkit scores``: the training examples behind a model's predictions, as a table, as JSON or as a page to show.

`command` has the options, `sources` the model with its data, `describe` what a person sees of an example, `run` the
work, `result` what came out, `table` and `page` how it is shown, `pictures` images as PNG.
"""
