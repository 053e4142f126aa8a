"""Each row of DEVIATIONS.md names the test that proves it; a row without one, or whose test has gone, fails here."""

from __future__ import annotations

import re

import pytest

from tests.support.serving import ROOT

# How a row's first column begins -> file and test, without their "test_".
PROOFS = {
    "a lone request with": "contract_deviations::a_lone_request_does_not_wait_for_others",
    "`PUT /models/m?batch_size": "contract_management::limits_of_a_running_model_hold_for_the_next_request",
    "unknown or malformed management": "contract_management::a_call_is_answered_as_the_contract_says",
    "a request that waits past": "contract_management::limits_of_a_running_model_hold_for_the_next_request",
    "`x-request-timeout-ms`": "deadlines::a_request_that_waits_past_its_clients_limit_never_runs",
    "`x-server-timing: 1`": "server_timing::the_native_lanes_stages_add_up",
    "a model or handler that runs past": "contract_responses::1_7_a_call_over_its_time_is_504",
    "a worker that crashes": "restart_policy::an_error_that_would_recur_is_final",
    "import error inside": "contract_deviations::a_model_that_cannot_be_served_fails_once_with_its_reason",
    'the text of an exception has "CUDA"': "contract_responses::1_7_what_a_handler_does_wrong",
    "out of memory in a batch": "invoker::when_memory_runs_out_halves_are_tried",
    "a result that JSON cannot hold": "contract_deviations::results_that_json_cannot_hold",
    "`sys.exit()` in": "field::what_must_happen_does",
    "`async def handle` without": "field::what_must_happen_does",
    "a handler that reads its standard": "field::what_must_happen_does",
    "an item of the result is": "contract_deviations::results_that_json_cannot_hold",
    "a sequence that ended": "sequences::an_idle_sequence_ends_and_the_next_request_is_told_once",
    "an answer over `max_response_size`": "contract_responses::1_7_an_answer_over_the_limit_names_it",
    "a worker that was killed": "contract_responses::1_7_what_a_handler_does_wrong",
    "`context.get_request_header`": "contract_inference::1_3_headers_as_the_handler_has_them",
    "OpenAPI descriptions": "contract_inference::1_2_a_model_describes_itself",
    "a model's description": "differential::answers_as_torchserve_does",
    "`Allow` of a 405": "differential::answers_as_torchserve_does",
    "`Date` of an answer": "http1::answer_has_its_headers_in_order",
    "kserve envelopes": "invoker::envelopes_unwrap_and_wrap",
    "`/v2`, `/v2/health/": "contract_inference::1_2_the_open_inference_protocol_without_its_switch",
    "`/v2/models/{m}`": "open_inference::metadata_names_inputs_and_outputs",
    "`/v2` metadata": "contract_inference::1_2_the_open_inference_protocol_without_its_switch",
    "errors under `/v2`": "open_inference::unknown_names_are_404_with_the_error_in_both_forms",
    "`/v1` and `/v2` bodies": "open_inference::v1_instances_are_rows",
    "`/models/{m}/{v}` where": "deploy::sagemakers_calls_and_versions_on_one_port",
    "`GET /v1/models`": "open_inference::v1_lists_models_and_their_readiness",
    "text_classifier": "handlers_text::batched_answers_are_those_of_single_requests",
    "a handler that yields": "contract_deviations::what_a_handler_yields_is_streamed",
    "metrics of a handler": "contract_deviations::metrics_of_handlers_need_no_declaration",
    "one bad item in a batch": "contract_responses::1_7_one_bad_item_fails_alone",
    "a picture or tensor": "serving_bad_input::what_is_no_picture_is_a_400_that_says_so",
    "a batch changes answers": "serving_batches::every_answer_is_that_of_its_row_alone",
    "what a model file reads from": "trace::what_the_code_reads_from_elsewhere_is_read_once_unless_it_runs_in_python",
    "a built-in handler that cannot answer": "native_proof::a_model_whose_output_cannot_be_answered_is_refused_at_load",
    "inputs that a compiled": "package_rules::what_the_program_was_not_compiled_for_never_reaches_it",
    "an input outside what": "declared_inputs::what_is_declared_holds_on_every_way_in",
    "`precision: bf16` or": "native_proof::a_precision_that_costs_too_much_is_refused_unless_that_is_allowed",
    "a field, a member of a JSON": "contract_inference::1_3_of_what_is_given_twice_nothing_is_dropped",
    "a form field that a built-in": "lossless_input::text_is_never_taken_for_numbers_in_memory",
    "members of `/v1` and": "open_inference::v1_says_what_is_wrong",
    "two different `Content-Type`": "http1::two_headers_that_ask_two_different_things_are_refused",
    "a multipart body that ends": "codec::a_broken_form_is_the_clients_error",
    "what stands before the first part": "codec::what_stands_around_the_parts_means_nothing",
    "a part's charset": "codec::a_part_of_any_charset_or_disposition_is_served",
    "of an url-encoded form": "codec::an_urlencoded_form_is_one_key_per_field",
    "a form with an unnamed": "codec::forms_that_torchserve_fails_on_are_refused",
    "JSON in UTF-16": "codec::json_may_be_utf_16_or_have_a_mark",
    "explanations and predictions": "rows_apart::explanations_and_predictions_of_one_batch_are_each_what_was_asked_for",
    "queue full and no worker": "contract_management::limits_of_a_running_model_hold_for_the_next_request",
    "error body": "serving_bad_input::errors_give_no_path_and_no_exception_away_when_others_can_ask",
    "a client closes its side": "deadlines::a_client_that_only_sends_no_more_still_has_its_answer",
    "answers ≥ 400": "contract_inference::1_1_connections_are_kept",
    "413": "contract_responses::1_9_a_body_at_the_limit_passes_and_one_above_is_told_both_sizes",
    "pipelining": "contract_inference::1_1_pipelined_requests_are_answered_in_order",
    "workers by default": "config_keys::strict_starts_a_worker_per_cpu_or_gpu",
    "model API": "management::model_api_is_on_only_for_this_machine_unless_said",
    "what a browser may do": "serving_security::a_page_cannot_change_models_through_a_browser_here",
    "`cors_allowed_origin`": "serving_security::pages_of_the_listed_origins_may_read_every_answer",
    "`allowed_urls`": "serving_sources::url_that_is_not_allowed_is_not_asked",
    "a URL whose host": "serving_sources::private_address_is_refused_and_a_url_at_the_start_is_fetched_once",
    "downloads": "serving_sources::failed_download_says_why_and_leaves_nothing",
    "a model store that is read-only": "archive_sources::read_only_store_has_what_is_fetched_kept_in_the_cache",
    "a URL at the start": "serving_sources::private_address_is_refused_and_a_url_at_the_start_is_fetched_once",
    "`modelUrl` of a fetched": "snapshot::a_signed_url_is_written_without_its_signature",
    "`s3://`": "fetch::object_is_fetched_by_bucket_and_key",
    "`s3_sse_kms`": "management::key_of_an_object_store_is_of_no_use_elsewhere",
    "a path or folder outside": "serving_sources::what_is_not_in_the_store_is_not_found",
    "`max_batch_delay` missing": "serving_sources::json_registration_has_the_defaults_of_a_query",
    "tokens": "tokens::who_needs_a_key",
    "a wrong token": "serving_security::every_other_call_needs_the_key_of_its_api",
    "one port for all": "serving_security::one_port_asks_each_call_for_one_key",
    "TLS": "serving_security::a_certificate_that_cannot_be_used_ends_the_start",
    "snapshots": "snapshot::instead_of_a_damaged_snapshot_the_one_before_is_restored",
    "a call that changes settings": "contract_management::workers_that_cannot_be_started_leave_everything_as_it_was",
    "`DELETE` of a model whose": "contract_deviations::an_archive_that_could_not_be_opened_is_forgotten_on_request",
    "`set-default` to a version": "contract_deviations::a_version_that_failed_does_not_become_the_default",
    "workers that cannot be started": "contract_management::workers_that_cannot_be_started_leave_everything_as_it_was",
    "`/metrics`": "metrics::torchserves_counters_have_its_labels_and_units",
    "`x-request-id`": "contract_responses::1_5_request_id",
    "`response_timeout` and `startup": "config_keys::strict_lets_the_yaml_go_before_the_parameters_of_time_limits",
    "environment variables": "config_keys::our_own_variable_needs_no_switch",
    "a value of config.properties": "config::bad_value_names_place_key_value_and_what_is_allowed",
    "`debug=true`": "config_keys::debug_means_one_worker_and_no_time_limit",
    "`/ping`": "contract_management::health_tells_what_cannot_answer_and_nothing_else",
    "class probabilities": "handlers_image::equal_labels_are_kept_apart",
    "NaN in a result": "contract_responses::1_6_a_value_as_bytes",
    "JSON nested": "codec::json_of_a_hundred_levels_is_the_deepest",
    "headers with an underscore": "http1::header_with_an_underscore_never_reaches_the_request",
    "registering over a version": "contract_deviations::registering_over_a_version_that_failed_replaces_it",
    "a form sent to the `tensor`": "serving::a_form_field_is_answered_with_json",
    "methods other than PUT": "contract_management::a_call_is_answered_as_the_contract_says",
    "`model_name` of a registration": "contract_deviations::a_name_that_the_archiver_would_not_take_is_refused",
    "`torchrun`": "contract_deviations::a_model_that_cannot_be_served_fails_once_with_its_reason",
    "gRPC on or off": "grpc_server::without_grpcio",
    "gRPC error texts": "grpc::errors_have_torchserves_codes_and_texts",
    "gRPC request over": "grpc::a_request_over_the_limit_is_told_the_setting_and_both_sizes",
    "gRPC deadline": "grpc::a_deadline_holds_in_the_queue_and_the_request_never_runs",
    "gRPC `StreamPredictions` on": "grpc::a_handler_that_does_not_stream_gives_one_message",
    "gRPC `StreamPredictions2`": "grpc::the_server_makes_an_id_for_a_sequence_that_starts",
    "gRPC `ListModels`": "grpc::list_has_pages",
    "gRPC metadata": "grpc::of_the_metadata_the_trace_reaches_the_handler_and_the_id_comes_back",
    "`GRPCInferenceService`": "grpc_triton::rows_are_answered_as_the_network_would",
    "gRPC health": "grpc_server::health_is_that_of_the_server_and_of_each_model",
    "workflows": "contract_deviations::there_are_no_workflows",
    "`torchserve --start`": "torchserve_command::server_in_the_background_as_scripts_know_it",
    "`torchserve` while its pid": "torchserve_command::server_in_the_background_as_scripts_know_it",
    "`python` in config": "config_keys::default_and_value_of_the_file",
    "`log4j2` files": "config::keys_without_an_effect_are_named_once",
    "threads and loggers": "log_files::records_go_to_the_files_they_belong_in",
    "lines of the access log": "torchserve_command::server_in_the_background_as_scripts_know_it",
    "a log file that cannot": "serving_logs::a_folder_that_cannot_be_written_disturbs_nobody",
    "values of queries": "serving_logs::signatures_of_urls_are_not_written_down",
    "torch's threads in": "handler_surroundings::torchs_threads_are_the_workers_share_or_the_handlers_own",
    "models' folders when": "own_folders::folders_end_with_their_server_however_it_ends",
    "log texts of workers": "serving_logs::a_workers_death_is_told_in_torchserves_words",
}
POINTS = [
    line.split("|")[1].strip()
    for line in (ROOT / "DEVIATIONS.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| point ")
]


@pytest.mark.parametrize("point", POINTS)
def test_a_row_has_a_test(point: str) -> None:
    # The longest that fits: some rows begin like others.
    begin = max((begin for begin in PROOFS if point.startswith(begin)), key=len, default=None)
    assert begin is not None, f"no test is named for the row {point!r}; add one to PROOFS"
    file, _, name = PROOFS[begin].partition("::")
    assert re.search(rf"def test_{name}\(", next((ROOT / "tests").rglob(f"test_{file}.py")).read_text()), PROOFS[begin]


def test_no_proof_is_of_a_row_that_has_gone() -> None:
    assert [begin for begin in PROOFS if not any(point.startswith(begin) for point in POINTS)] == []
