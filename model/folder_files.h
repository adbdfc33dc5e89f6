// folder_files - the files of a Hugging Face folder: which links are followed, which files are
// missing, not downloaded, or there and not read. Private to hf_folder.cpp and safetensors.cpp.
#pragma once

#include <string>
#include <vector>

namespace tq {

/// Text of `name` in `folder`, "" if there is no such file. The text may end up in a .tq file, so a
/// symbolic link is followed only where it stays in the folder, or leads to the blobs of a Hugging
/// Face cache. Throws kIo for other links and for what is no regular file, kBadData for a Git LFS
/// pointer or more than `max_bytes`.
std::string folder_text(const std::string& folder, const std::string& name, size_t max_bytes);

/// The file is there (also where it is a link to nothing, which reading then reports).
bool in_folder(const std::string& folder, const std::string& name);

/// Throws kBadData saying what the folder holds instead of a model that can be read: an adapter, or
/// weights in another format. Returns if nothing of the kind is there.
void explain_missing(const std::string& folder, const std::string& missing);

/// What lies beside the weights, looks like weights, and is not read: one sentence each.
std::vector<std::string> unread_files(const std::string& folder,
                                      const std::vector<std::string>& weights);

}  // namespace tq
