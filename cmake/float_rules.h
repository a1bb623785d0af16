/* Included before every file of ours by the build. A finite-math build drops the tests for NaN and -inf that masks,
 * empty heads and alarms rely on, and does it silently. */
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "-ffast-math and -ffinite-math-only break Kvasir: -inf is a legal attention score"
#endif
#if defined(__FAST_MATH__)
#error "-ffast-math reorders sums: results would depend on the instruction set"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "float arithmetic must be done in float (x87 excess precision breaks bit equality): use SSE"
#endif
