"""Quantised base layers, one file for each library. A file is imported when its library is, never before."""
