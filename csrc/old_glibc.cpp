// In wheels for manylinux_2_28 alone: what this machine's headers refer to and glibc 2.28 or GCC 8's libstdc++ lack.

#include <new>
#include <sstream>

#define QK_HIDDEN extern "C" __attribute__((visibility("hidden")))

// Never "single threaded": counts of shared pointers are always atomic.
QK_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

QK_HIDDEN [[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// With the members that C++20 added to them.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
