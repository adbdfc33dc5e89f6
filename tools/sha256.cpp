// sha256 - see sha256.h. OpenSSL's low-level functions: they allocate nothing, where EVP (and
// SHA256(), which calls it) follows null pointers when memory runs out.
#define OPENSSL_API_COMPAT 0x10100000L  // before they were called deprecated

#include "tools/sha256.h"

#include <openssl/sha.h>

namespace tq {

std::string sha256_hex(std::string_view bytes) {
  SHA256_CTX context;
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256_Init(&context);
  SHA256_Update(&context, bytes.data(), bytes.size());
  SHA256_Final(digest, &context);
  std::string hex;
  for (unsigned char byte : digest) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

}  // namespace tq
