/* What the headers of GCC 9 to 11 and glibc 2.32 call and the libraries of older systems do not have: with these in it,
 * the extension runs wherever OpenVINO itself does (manylinux_2_28).  None of it leaves the library (exports.map).
 */
#include <new>
#include <sstream>

/* False: reference counts are always atomic. */
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

template class std::basic_ostringstream<char>;

namespace std {
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
