#!/bin/bash
# Measures a converted chat model on one GPU.
#
#     export MODEL=out/hsa-smollm2/model BASE=out/smollm2 STREAMS=out/streams QA=qa/train.jsonl.gz BABI=babi \
#            CHATS=out/unseen_chats.jsonl WORDS=wonderwords.json OUTPUT=out/results
#     bash examples/recipes/adaptation/evaluate.sh quick    # validation, 4,096 tokens: for choices
#     bash examples/recipes/adaptation/evaluate.sh table    # test, 4K, 64K and 1M tokens, three seeds: once, at the end
#     bash examples/recipes/adaptation/evaluate.sh base     # test, the base beside the model, 1K to 8K tokens
#
# WORDS has RULER's lists of nouns, adjectives and verbs (wonderwords). Every command writes a file of its own, after
# every row, so that a run that is cut short keeps what it has. Three or more run at a time: while one generates, which
# leaves most of a GPU idle, another reads.
set -u
cd "$(dirname "$0")/../../.."

model=(--model "$MODEL" --dtype bfloat16)
measure() {  # a folder for the results, a command and its flags
  mkdir -p "$OUTPUT/$1"
  python examples/evaluate.py "$2" --output "$OUTPUT/$1" "${@:3}" >"$OUTPUT/$1/log.txt" 2>&1 || echo "$1: failed"
}

case "${1:-}" in
quick)
  books=("${model[@]}" --haystack "$STREAMS/books-validation.npy" --lengths 4096)
  asked=("${books[@]}" --split validation)
  measure quick/facts facts "${asked[@]}" --samples 48 &
  measure quick/qa qa "${asked[@]}" --qa "$QA" --samples 48 --base "$BASE" &
  measure quick/paper paper "${asked[@]}" --samples 32 &
  measure quick/ruler ruler "${asked[@]}" --words "$WORDS" --samples 16 &
  measure quick/babilong babilong "${asked[@]}" --babi "$BABI" --samples 48 &
  { measure quick/ppl ppl "${books[@]}" --tasks last --samples 32 --batch_size 8 --base "$BASE"
    measure quick/chat chat "${model[@]}" --base "$BASE" --chats "$CHATS" --samples 100 --prompts 8; } &
  ;;
table)
  books=("${model[@]}" --haystack "$STREAMS/books-test.npy" --segment 65536)
  lengths=(--lengths 4096 65536 1048576)
  # Of a task and seed at most 3 texts of 64K tokens, and one of 1M.
  asked=("${books[@]}" "${lengths[@]}" --seeds 0 1 2 --most_read 196608)
  { measure table/facts facts "${asked[@]}" --samples 34
    measure table/chat chat "${model[@]}" --base "$BASE" --chats "$CHATS"
    measure table/ppl ppl "${books[@]}" "${lengths[@]}" --tasks last --samples 6 --base "$BASE"
    measure table/s_niah paper "${books[@]}" --tasks s_niah --lengths 65536 1048576 --seeds 3 4 5 --samples 3; } &
  { measure table/qa qa "${asked[@]}" --qa "$QA" --samples 31 --base "$BASE"
    measure table/paper paper "${asked[@]}" --samples 34
    measure table/babilong babilong "${asked[@]}" --babi "$BABI" --samples 34; } &
  measure table/ruler ruler "${asked[@]}" --words "$WORDS" --samples 16 &
  ;;
base)
  asked=("${model[@]}" --haystack "$STREAMS/books-test.npy" --seeds 0 1 2 --base "$BASE")
  measure base/facts facts "${asked[@]}" --lengths 1024 4096 8192 --samples 34 &
  measure base/qa qa "${asked[@]}" --lengths 1024 8192 --qa "$QA" --samples 31 &
  measure base/paper paper "${asked[@]}" --lengths 1024 4096 8192 --samples 34 &
  measure base/babilong babilong "${asked[@]}" --lengths 1024 4096 8192 --babi "$BABI" --samples 34 &
  measure base/ruler ruler "${asked[@]}" --lengths 4096 8192 --words "$WORDS" --samples 16 &
  ;;
*)
  echo "usage: bash evaluate.sh quick|table|base" >&2
  exit 2
  ;;
esac
wait
for log in "$OUTPUT/$1"/*/log.txt; do
  echo "-- $(basename "$(dirname "$log")")"
  grep -v "it/s\|sample/s\|s/sample\|Loading weights" "$log" | tail -40
done
