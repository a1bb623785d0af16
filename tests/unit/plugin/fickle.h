/* The ways in which tests/unit/plugin/fickle.c can break the contract, and where. */
#ifndef FICKLE_H
#define FICKLE_H

#include <kvasir_policy.h>

enum { FICKLE_LAYER = 1, FICKLE_HEAD = 2 };
enum {
    FICKLE_RIGHT = 0,
    FICKLE_ALL_NAN,
    FICKLE_SCORE_OVERRUN,
    FICKLE_UNSORTED,
    FICKLE_TWICE,
    FICKLE_OUT_OF_RANGE,
    FICKLE_TOO_MANY,
    FICKLE_HUGE_COUNT,
    FICKLE_NONE,
    FICKLE_UNPROTECTED,
    FICKLE_CHOOSE_OVERRUN,
    FICKLE_TARGET_TOO_MANY,
    FICKLE_TARGET_ALL,
    FICKLE_WORK,
};

#endif
