// Error messages, their escaping, exit codes, and TQ_CHECK.
#include <gtest/gtest.h>

#include "model/error.h"
#include "tests/expect_error.h"

namespace tq {
namespace {

TEST(Error, MessageIsWhatWhereWhyHint) {
  const Error plain(ErrorKind::kIo, "cannot open", "a.tq", "no such file");
  EXPECT_STREQ(plain.what(), "cannot open (a.tq): no such file");
  const Error hinted(ErrorKind::kIo, "cannot open", "a.tq", "no such file", "check the path");
  EXPECT_STREQ(hinted.what(), "cannot open (a.tq): no such file; check the path");
}

TEST(Error, KindIsTheExitCode) {
  EXPECT_EQ(static_cast<int>(ErrorKind::kInternal), 1);
  EXPECT_EQ(static_cast<int>(ErrorKind::kUsage), 2);
  EXPECT_EQ(static_cast<int>(ErrorKind::kBadData), 3);
  EXPECT_EQ(static_cast<int>(ErrorKind::kResource), 4);
  EXPECT_EQ(static_cast<int>(ErrorKind::kIo), 5);
  EXPECT_EQ(static_cast<int>(ErrorKind::kInterrupted), 130);
  EXPECT_EQ(Error(ErrorKind::kResource, "a", "b", "c").kind(), ErrorKind::kResource);
}

TEST(Error, EveryPartIsEscaped) {
  const Error error(ErrorKind::kBadData, "a\n", "b\x1b[2J", "c\r", "d\t");
  EXPECT_STREQ(error.what(), "a\\x0A (b\\x1B[2J): c\\x0D; d\\x09");
}

TEST(Printable, EscapesControlCharacters) {
  EXPECT_EQ(printable(std::string("\0", 1)), "\\x00");
  EXPECT_EQ(printable("\x7f"), "\\x7F");
  EXPECT_EQ(printable("\xC2\x9B"), "\\xC2\\x9B");  // C1: CSI
  EXPECT_EQ(printable("\xE2\x80\xAE"
                      "abc"),
            "\\xE2\\x80\\xAE"
            "abc");  // right-to-left override
  EXPECT_EQ(printable("\xE2\x80\x8F"), "\\xE2\\x80\\x8F");
  EXPECT_EQ(printable("\xE2\x81\xA6\xE2\x81\xA9"), "\\xE2\\x81\\xA6\\xE2\\x81\\xA9");
}

TEST(PrintableText, KeepsLinesAndDirectionMarksAndNothingElseThatControls) {
  EXPECT_EQ(printable_text("a\n\tb"), "a\n\tb");
  EXPECT_EQ(printable_text("\xE2\x80\x8F"), "\xE2\x80\x8F");  // right-to-left mark
  EXPECT_EQ(printable_text("\x1b[2J\r\x7f"), "\\x1B[2J\\x0D\\x7F");
  EXPECT_EQ(printable_text("\xC2\x9B\x9B"), "\\xC2\\x9B\\x9B");  // CSI, in UTF-8 and alone
}

TEST(Printable, KeepsTextOfAllLanguages) {
  for (const char* text : {"plain ASCII ~", "\xC2\xA0", "na\xC3\xAFve", "\xE2\x80\xA6",
                           "\xE4\xB8\xAD\xE6\x96\x87", "\xF0\x9F\x98\x80"}) {
    EXPECT_EQ(printable(text), text);
  }
}

TEST(Printable, EscapesBytesThatAreNotUtf8) {
  EXPECT_EQ(printable("a\xFF"), "a\\xFF");
  EXPECT_EQ(printable("\x9B"), "\\x9B");  // C1 of an 8-bit terminal
  EXPECT_EQ(printable("\xC3"), "\\xC3");  // ends early
  EXPECT_EQ(printable("\xC3"
                      "b"),
            "\\xC3"
            "b");  // what follows is read again
  EXPECT_EQ(printable("\xE2\x80"), "\\xE2\\x80");
  EXPECT_EQ(printable("\xC0\x8A"), "\\xC0\\x8A");  // overlong line feed
  EXPECT_EQ(printable("\xF5\x80\x80\x80"), "\\xF5\\x80\\x80\\x80");
}

TEST(Check, PassesQuietlyAndFailsAsInternalError) {
  TQ_CHECK(1 + 1 == 2);
  expect_error(ErrorKind::kInternal, {"1 + 1 == 3", "test_error.cpp", "arithmetic"},
               [] { TQ_CHECK(1 + 1 == 3, "arithmetic"); });
}

}  // namespace
}  // namespace tq
