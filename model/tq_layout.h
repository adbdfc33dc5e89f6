// tq_layout - the bytes of a .tq file that are not tensors: prologue and tensor table.
//
// Private to tq_file.cpp (writer, verify) and tq_reader.cpp. Layout: docs/format.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/input_file.h"
#include "model/json.h"
#include "model/tensor.h"
#include "model/weights.h"

namespace tq {

// As in PNG: a byte above 127, CR LF, ctrl-Z and LF reveal transfers that treat the file as text.
constexpr unsigned char kTqMagic[8] = {0x89, 'T', 'Q', 0x0D, 0x0A, 0x1A, 0x0A, 0x00};
constexpr uint32_t kTqByteOrder = 0x01020304;
constexpr uint64_t kTqAlignment = 64;
constexpr uint64_t kTqMaxHeaderBytes = 64ull << 20;

/// First 64 bytes of the file, little endian.
struct TqPrologue {
  unsigned char magic[8];
  uint32_t version;
  uint32_t byte_order;     // kTqByteOrder as the writer's machine stores it
  uint64_t header_offset;  // where the JSON header begins; a multiple of 64
  uint64_t header_bytes;
  uint64_t header_hash;    // XXH3-64 of the header
  uint64_t file_bytes;     // header_offset + header_bytes: the whole file
  uint64_t reserved;       // 0
  uint64_t prologue_hash;  // XXH3-64 of the 56 bytes before it
};
static_assert(sizeof(TqPrologue) == 64);

struct TqTensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  uint64_t offset = 0, bytes = 0;
  std::string hash;
};

struct TqLayout {
  uint64_t header_offset = 0;
  Json header;
  std::vector<TqTensor> tensors;  // in file order
};

/// Validates prologue, header checksum and the tensor table (order, alignment, bounds, sizes).
/// Throws kBadData.
TqLayout read_tq_layout(const MappedFile& file);

/// Checks every tensor against its checksum and that the gaps between them are zero: with the
/// layout that is every byte of the file. On all cores. Throws kBadData naming the first that is
/// wrong.
void check_contents(const MappedFile& file, const TqLayout& layout);
void check_tensor(const MappedFile& file, const TqTensor& tensor);

std::string hash_text(uint64_t hash);  // 16 hex digits

const char* storage_name(Storage storage);

struct NamedText {
  const char* name;
  std::string ModelTexts::*member;
};
inline constexpr NamedText kModelTexts[] = {{"config", &ModelTexts::config},
                                            {"tokenizer", &ModelTexts::tokenizer},
                                            {"tokenizer_config", &ModelTexts::tokenizer_config},
                                            {"generation_config", &ModelTexts::generation_config},
                                            {"chat_template", &ModelTexts::chat_template}};

}  // namespace tq
