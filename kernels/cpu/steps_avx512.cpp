// The library for processors with AVX-512, by the flags that setup.py compiles this file with: a
// file of its own, because two objects of one name would take each other's place.
#include "steps.cpp"
