# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share.

`pairs` and `spread` compare two sides; `servers`, `endpoint`, `processes`, `decoding` and
`perplexity` deal with running servers; `arguments`, `results`, `markdown` and `plots` are the
command line and the files.
"""
