"""One recurrent layer, or a stack of them, on any device; README.md beside this file is the map."""
