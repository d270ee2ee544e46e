"""The models that the seed documents describe: what they count, and the search for the widths that they leave open."""
