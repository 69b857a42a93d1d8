"""The loss of a program as terms: `find_losses` reads which rows of which loss it sums, and weighs.

`tail` is what is linear between a term and the result, `rows` a loss as a function of rows,
`recognise` the known losses by their values, and `terms` what is found.
"""
