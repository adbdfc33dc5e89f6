// expect_error - checks the kind and the words of a tq::Error.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "model/error.h"

namespace tq {

/// Runs `action`; it must throw an Error of this kind whose one-line message has all `words`.
template <typename Action>
void expect_error(ErrorKind kind, std::initializer_list<std::string> words, Action&& action) {
  try {
    action();
    ADD_FAILURE() << "no error, expected one with \"" << *words.begin() << "\"";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(static_cast<int>(error.kind()), static_cast<int>(kind)) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << "no \"" << word << "\" in: " << message;
    }
  }
}

}  // namespace tq
