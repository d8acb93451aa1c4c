"""The environment variables that all three scripts read, for the end of their --help."""

ENVIRONMENT = """\
environment:
  NATS_SERVER        where NATS is (default nats://localhost:4222); NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD
  ETCD_ENDPOINTS     where etcd is (default http://localhost:2379); ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD,
                     ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY
  DYN_LOG            what to log: error, warn, info, debug, trace, or a filter such as info,dynamo_runtime=debug
                     (DYN_LOG_LEVEL is read where DYN_LOG is not set); DYN_LOGGING_JSONL=1 for JSON lines
  DYN_SYSTEM_PORT    where to serve /metrics, up to 32767, on DYN_SYSTEM_HOST (default 127.0.0.1; no port by default)
  OTEL_EXPORT_ENABLED=1
                     to send spans by OTLP to OTEL_EXPORTER_OTLP_TRACES_ENDPOINT (default http://localhost:4317)
  DYN_TCP_RESPONSE_STREAM_HOST
                     the network interface on which answers come back to this process (default lo, this machine;
                     empty for that of the default route); DYN_TCP_RESPONSE_STREAM_PORT
  DYN_CHAT_CPUS      the CPUs for this process, such as 3 or 2-3 (default: any; SGLang's own processes are left alone)
"""
