/* report.html: one self-contained page drawn from a benchmark's output folder (docs/output.md). Reads what the runner
 * wrote; computes no metric of its own, only shares, means and rank correlations over it with their intervals. */
#ifndef KVS_BENCH_REPORT_H
#define KVS_BENCH_REPORT_H

#include "kvasir.h"

/* Reads manifest.json, summary.csv, turns.jsonl, events.jsonl, claims.json, keepsets.jsonl and, where there is one,
 * recall.jsonl in dir and writes dir/report.html: into a temporary file first, renamed when it is whole. An older page
 * stays if anything fails. Errors: EIO a file is missing or the page cannot be written; EFORMAT a file is truncated or
 * not as docs/output.md says (the message names file and line); EUNSUPPORTED another schema; ENOMEM. */
kvs_status kvs_report_write(const char *dir, kvs_error *err);

#endif
