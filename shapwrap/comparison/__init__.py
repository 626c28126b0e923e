"""The comparison: models x methods x metrics on a data set, by one configuration file."""
