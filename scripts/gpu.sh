#!/usr/bin/env bash
# Make good use of a quarter of an hour on a machine with one GPU and no network. Every step has its
# own time limit and writes its own files to OUT.
#
#   gpu.sh checks OUT           the tests marked gpu                               3 minutes at most
#   gpu.sh campaign OUT DATA    the campaign on CUDA; OUT gets its results         9
#   gpu.sh bench OUT            training, then ONNX Runtime on CUDA                8
#
# Unpack results by `cat OUT/results.tar.* | tar x -C runs/gpu`, then `campaign.py merge runs/gpu`.
#
# A large file that the machine lacks is sent in several calls, because one takes at most SIZE:
#
#   gpu.sh pieces WHEEL DIR     here: a large wheel (onnxruntime-gpu) as folders DIR/1, DIR/2, ...
#   gpu.sh take DIR/1           there: keeps a piece until `bench`, which joins them
#
# WHEELS names a folder of small wheels that are installed first (tyro and what it needs). DATA holds
# the data sets, as folders or .tar.xz. The other variables below are for small rehearsals.
set -euo pipefail

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-}
SIZE=${SIZE:-56M}
KEPT=${KEPT:-/tmp/pieces}
SITE=${SITE:-/tmp/site}
DEVICE=${DEVICE:-cuda}
BUDGET=${BUDGET:-7m30s}
PLAN=${PLAN:-$(dirname "$0")/campaign.toml}
RUN=${RUN:-/tmp/campaign}
TRAIN=${TRAIN:---rounds 3}
DEPLOY=${DEPLOY:---options.providers CUDAExecutionProvider --options.cuda-graph --options.repeats 10}

cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"

install() { # WHEEL...
	"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$@"
}

if [ -n "$WHEELS" ] && [ ! -e "$SITE/.small" ]; then
	install "$WHEELS"/*.whl
	touch "$SITE/.small"
fi

checks() {
	timeout 180 "$PYTHON" -m pytest -m gpu -v --numprocesses 0 ${TESTS:-} 2>&1 | tee "$1/checks.txt"
}

campaign() {
	local data=$2 archive
	mkdir -p "$RUN"
	for archive in "$2"/*.tar.xz; do
		if [ -e "$archive" ]; then
			data=$RUN/data
			mkdir -p "$data"
			tar xf "$archive" -C "$data"
		fi
	done
	timeout 540 "$PYTHON" scripts/campaign.py run --plan "$PLAN" --out "$RUN/out" --budget "$BUDGET" \
		--device "$DEVICE" --data-dir "$data" 2>&1 | tee "$1/campaign.txt" || true
	[ -d "$RUN/out" ] || exit 1
	(
		cd "$RUN/out"
		find . -type f -size -12M \( -name '*.json' -o -name '*.jsonl' -o -name '*.safetensors' -o \
			-name log.txt \) -not -path '*/training/*' -print0 |
			tar c --null --files-from - | split -b 15M - "$1/results.tar."
	)
}

bench() {
	timeout 150 "$PYTHON" scripts/bench train $TRAIN 2>&1 | tee "$1/train.txt" || true
	if compgen -G "$KEPT/*.whl.*" >/dev/null; then
		local whole
		whole=$(basename "$(compgen -G "$KEPT/*.whl.*" | head -n 1)")
		cat "$KEPT"/*.whl.* | xz --decompress | tar x -C "$SITE"
		echo "joined ${whole%%.whl.*}"
	fi
	timeout 330 "$PYTHON" scripts/bench deploy --no-latency --out "$1/deploy.jsonl" $DEPLOY 2>&1 |
		tee "$1/deploy.txt"
}

pieces() {
	local name work number=0 piece
	name=$(basename "$1")
	work=$(mktemp -d)
	"$PYTHON" -m zipfile -e "$1" "$work/whole"
	rm -f "$work"/whole/*/capi/*tensorrt*
	tar c -C "$work/whole" . | xz --threads=0 | split -b "$SIZE" - "$work/$name."
	for piece in "$work/$name."*; do
		number=$((number + 1))
		mkdir -p "$2/$number"
		mv "$piece" "$2/$number/"
	done
	rm -r "$work"
	echo "$number pieces in $2"
}

take() {
	mkdir -p "$KEPT"
	cp "$1"/* "$KEPT/"
}

usage() {
	sed -n '2,/^set/p' scripts/gpu.sh | sed '$d; s/^# \{0,1\}//' >&2
	exit 2
}

step=${1:-}
case $step in
checks | campaign | bench | pieces | take)
	shift
	case $step in campaign | pieces) needed=2 ;; *) needed=1 ;; esac
	[ $# -ge "$needed" ] || usage
	if [ "$step" != pieces ] && [ "$step" != take ]; then
		mkdir -p "$1" "$SITE"
		set -- "$(realpath "$1")" "${@:2}"
	fi
	"$step" "$@"
	;;
*)
	usage
	;;
esac
