// Empty: emulation.hpp, included first, has everything that integer kernels use.
