"""The commands of `mstar`, a file for each; `mstar.cli` puts them together."""
