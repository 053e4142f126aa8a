#!/usr/bin/env bash
# The curl calls of TorchServe's documentation (management, inference, metrics, KServe and token pages), each with the
# status and text it is to have. They hold for TorchServe 0.12 and for pyserve:
#
#   torchserve --start --model-store store --enable-model-api --disable-token-auth --ncs     (metrics_mode=prometheus)
#   tests/golden/documented_calls.sh store
#
# With tokens, name the file of keys: KEY_FILE=key_file.json tests/golden/documented_calls.sh store; where somebody else
# made that file, so that nobody can be given another key, with FIXED_KEYS=1.
# The first argument is the server's model store, into which two small archives are packed. INFERENCE, MANAGEMENT and
# METRICS are the addresses, ARCHIVER the archiver. Ends with 1 if an answer was another one.
set -u
STORE=${1:?usage: documented_calls.sh MODEL_STORE}
INFERENCE=${INFERENCE:-http://localhost:8080}
MANAGEMENT=${MANAGEMENT:-http://localhost:8081}
METRICS=${METRICS:-http://localhost:8082}
ARCHIVER=${ARCHIVER:-torch-model-archiver}
KEY_FILE=${KEY_FILE:-}
FIXED_KEYS=${FIXED_KEYS:-}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
calls=0
failures=0

key() { # key SCOPE: the key of that API
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]]["key"])' "$KEY_FILE" "$1"
}

call() { # call STATUS TEXT curl-arguments...: both are regular expressions
    local status=$1 text=$2 answer
    shift 2
    calls=$((calls + 1))
    printf '\n$ curl'
    printf ' %q' "$@" | sed 's/Bearer\\ [^ ]*/Bearer\\ KEY/'
    answer=$(curl -sS --max-time 100 -w '\n%{http_code}' "$@" 2>&1)
    printf '\n%s\n' "$answer"
    if ! grep -Eqx -- "$status" <<<"${answer##*$'\n'}"; then
        failures=$((failures + 1))
        echo "FAILED: expected status $status"
    elif ! grep -Eq -- "$text" <<<"$answer"; then
        failures=$((failures + 1))
        echo "FAILED: expected $text"
    fi
}

api() { # api SCOPE URL STATUS TEXT curl-arguments...: with the key of that API, if keys are asked for
    local scope=$1 url=$2 status=$3 text=$4
    shift 4
    if [ -n "$KEY_FILE" ]; then
        set -- "$@" -H "Authorization: Bearer $(key "$scope")"
    fi
    call "$status" "$text" "$url" "$@"
}

# PATH STATUS TEXT curl-arguments...
inference() { api inference "$INFERENCE$1" "${@:2}"; }
manage() { api management "$MANAGEMENT$1" "${@:2}"; }
metrics() { call "$2" "$3" "$METRICS$1" "${@:4}"; }

# --- two versions of a model that answers with the size of what it gets ----------------------------------------------

cat >"$work/noop.py" <<'PYTHON'
class Noop:
    def initialize(self, context):
        self.initialized = True

    def handle(self, data, context):
        if context.get_request_header(0, "describe") == "True":
            return [{"documented": "yes"}]
        return [{"fields": sorted(row)} for row in data]
PYTHON
for version in 1.0 2.0; do
    $ARCHIVER --model-name noop --version "$version" --handler "$work/noop.py" --export-path "$work" --force >/dev/null &&
        mv "$work/noop.mar" "$STORE/noop-$version.mar" || exit 2
done
printf 'not really a kitten' >"$work/kitten.jpg"
printf '{"instances": [{"data": [1.0, 2.0]}]}' >"$work/instances.json"
printf '{"inputs": [{"name": "input-0", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}]}' >"$work/inputs.json"

# --- management API ---------------------------------------------------------------------------------------------------

manage "/models?url=noop-1.0.mar" 200 \
    'Model ..noop.. Version: 1.0 registered with 0 initial workers. Use scale workers API to add workers' -X POST
manage "/models?url=noop-1.0.mar" 409 'Model version 1.0 is already registered for model noop' -X POST
manage "/models?url=nothing.mar" 404 'Model not found at: nothing.mar' -X POST
manage "/models?initial_workers=1&synchronous=false&url=noop-2.0.mar" 202 'Processing worker updates...' -v -X POST
manage "/models/noop?min_worker=3" 202 'Processing worker updates...' -v -X PUT
manage "/models/noop?min_worker=3&synchronous=true" 200 'Workers scaled to 3 for model: noop' -v -X PUT
manage "/models/noop/2.0?min_worker=1&synchronous=true" 200 'Workers scaled to 1 for model: noop, version: 2.0' -v -X PUT
manage "/models/noop" 200 '"modelVersion": "1.0"'
manage "/models/noop/2.0" 200 '"modelVersion": "2.0"'
manage "/models/noop/all" 200 '"modelVersion": "2.0"'
manage "/models/noop/1.0?customized=true" 200 '"documented": "yes"'
manage "/models/unknown" 404 '"message": "Model not found: unknown"'
manage "/models" 200 '"modelName": "noop"'
manage "/models?limit=2&next_page_token=0" 200 '"modelUrl": "noop-1.0.mar"'
manage "/models/noop/2.0/set-default" 200 'Default version successfully updated for model ..noop.. to ..2.0..' -v -X PUT
manage "/models/noop/1.0/set-default" 200 'Default version successfully updated for model ..noop.. to ..1.0..' -v -X PUT
manage "/" 200 '"title": "TorchServe APIs"' -X OPTIONS
manage "/models/noop" 200 'RESTful Management API for: noop' -X OPTIONS

# --- inference API ----------------------------------------------------------------------------------------------------

inference "/" 200 '"title": "TorchServe APIs"' -X OPTIONS
inference "/api-description" 200 '"/predictions/\{model_name\}"'
inference "/ping" 200 '"status": "Healthy"'
inference "/predictions/noop" 200 '"body"' -T "$work/kitten.jpg"
inference "/predictions/noop" 200 '"data"' -F "data=@$work/kitten.jpg"
inference "/predictions/noop/2.0" 200 '"body"' -T "$work/kitten.jpg"
inference "/predictions/noop" 200 '"context"' -F "question=who" -F "context=@$work/kitten.jpg"
inference "/predictions/noop" 200 '"body"' -X POST -H 'Content-Type: application/json' -d '{"text": "hello"}'
inference "/predictions/noop" 200 'RESTful API for: noop' -X OPTIONS
inference "/explanations/noop" 200 '"body"' -T "$work/kitten.jpg"
inference "/predictions/unknown" 404 '"type": "ModelNotFoundException"' -T "$work/kitten.jpg"
inference "/predictions/noop/3.0" 404 'Model version: 3.0 does not exist for model: noop' -T "$work/kitten.jpg"

# --- KServe -----------------------------------------------------------------------------------------------------------

inference "/v1/models/noop:predict" 200 '"body"' -H 'Content-Type: application/json' --data "@$work/instances.json"
inference "/v1/models/noop:explain" 200 '"body"' -H 'Content-Type: application/json' --data "@$work/instances.json"
inference "/v2/models/noop/infer" 200 '"body"' -H 'Content-Type: application/json' --data "@$work/inputs.json"
inference "/v2/models/noop/explain" 200 '"body"' -H 'Content-Type: application/json' --data "@$work/inputs.json"
manage "/v1/models/noop" 200 '"ready": true'

# --- metrics API ------------------------------------------------------------------------------------------------------

metrics "/metrics" 200 '^ts_inference_requests_total\{model_name="noop",model_version="default",hostname='
metrics "/metrics?name[]=ts_inference_latency_microseconds&name[]=ts_queue_latency_microseconds" 200 \
    '^ts_queue_latency_microseconds\{' --globoff

# --- tokens -----------------------------------------------------------------------------------------------------------

if [ -n "$KEY_FILE" ] && [ -z "$FIXED_KEYS" ]; then
    old=$(key inference)
    call 200 '' "$MANAGEMENT/token?type=inference" -H "Authorization: Bearer $(key API)"
    call '40[01]' 'Token Authorization failed' "$INFERENCE/predictions/noop" -d x -H "Authorization: Bearer $old"
    call '40[01]' 'Token Authorization failed' "$INFERENCE/predictions/noop" -d x
    call '40[01]' 'Token Authorization failed' "$MANAGEMENT/models/noop" -H "Authorization: Bearer $(key inference)"
    call '40[01]' 'Token Authentication failed' "$MANAGEMENT/token?type=inference" -H "Authorization: Bearer $old"
    inference "/predictions/noop" 200 '"body"' -T "$work/kitten.jpg"
    call 200 '' "$MANAGEMENT/token?type=management" -H "Authorization: Bearer $(key API)"
    manage "/models/noop" 200 '"modelName": "noop"'
fi

# --- and away ---------------------------------------------------------------------------------------------------------

manage "/models/noop/2.0" 200 'Model ..noop.. unregistered' -X DELETE
manage "/models/noop" 200 'Model ..noop.. unregistered' -X DELETE
manage "/models/noop" 404 'Model not found: noop' -X DELETE

printf '\n%d calls, %d of them with another answer than documented\n' "$calls" "$failures"
[ "$failures" -eq 0 ]
