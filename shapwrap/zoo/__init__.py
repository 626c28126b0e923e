"""The compatibility survey: every model of the supported libraries, built, wrapped and checked."""
