{{/* What the other templates ask for. Each takes the root: its .Values.whippet has this chart's values. */}}

{{- define "whippet.fullname" -}}
{{- if .Values.whippet.fullnameOverride }}{{ .Values.whippet.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains "whippet" .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-whippet" (.Release.Name | trunc 55 | trimSuffix "-") }}
{{- end }}
{{- end }}

{{- define "whippet.labels" -}}
app.kubernetes.io/name: whippet
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Subcharts.whippet.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.whippet.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "whippet.image" -}}
{{- with .Values.whippet.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Subcharts.whippet.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{/* whippet.yaml: the user's, with an address that the kubelet reaches. */}}
{{- define "whippet.config" -}}
{{- if not (hasKey .Subcharts "whippet") }}
  {{- fail "give the dependency whippet-sidecar `alias: whippet` in Chart.yaml: its templates look for its values and files there" }}
{{- end }}
{{- if not .Values.whippet.config }}
  {{- fail "config is empty: it takes what would be in whippet.yaml; source.url, kafka.bootstrap_servers and a table's name are enough" }}
{{- end }}
{{- $config := deepCopy .Values.whippet.config }}
{{- $admin := $config.admin | default dict }}
{{- if not $admin.listen }}{{ $_ := set $admin "listen" "0.0.0.0:9464" }}{{ end }}
{{- $_ := set $config "admin" $admin }}
{{- if regexMatch "^(127\\.|\\[::1\\])" $admin.listen }}
  {{- fail (printf "config.admin.listen is %s: probes come from outside the pod; leave it out, or set 0.0.0.0:9464 or [::]:9464" $admin.listen) }}
{{- end }}
{{- with $config.ingest }}
  {{- if and $.Values.whippet.ingestForOthers (not .listen) }}{{ $_ := set . "listen" "0.0.0.0:9465" }}{{ end }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- define "whippet.adminPort" -}}
{{- (include "whippet.config" . | fromYaml).admin.listen | splitList ":" | last }}
{{- end }}

{{/* The port of ingest, or nothing. */}}
{{- define "whippet.ingestPort" -}}
{{- with (include "whippet.config" . | fromYaml).ingest }}{{ .listen | default ":9465" | splitList ":" | last }}{{ end }}
{{- end }}

{{/* Whether this is a sidecar that Kubernetes knows as one: "true" or nothing. */}}
{{- define "whippet.isNative" -}}
{{- if eq (toString .Values.whippet.native) "auto" }}
  {{- if semverCompare ">=1.29.0-0" .Capabilities.KubeVersion.Version }}true{{ end }}
{{- else if .Values.whippet.native }}true{{ end }}
{{- end }}

{{/* shutdown.grace in whole seconds, rounded up, and 5 for closing connections. */}}
{{- define "whippet.graceSeconds" -}}
{{- $text := dig "shutdown" "grace" "20s" .Values.whippet.config | toString }}
{{- $units := dict "ms" 1 "millis" 1 "s" 1000 "sec" 1000 "secs" 1000 "second" 1000 "seconds" 1000 "m" 60000 "min" 60000 "mins" 60000 "minute" 60000 "minutes" 60000 "h" 3600000 "hr" 3600000 "hour" 3600000 "hours" 3600000 }}
{{- $milliseconds := 0 }}
{{- $parts := regexFindAll "[0-9]+ *[a-z]+" $text -1 }}
{{- range $parts }}
  {{- $unit := regexFind "[a-z]+" . }}
  {{- if not (hasKey $units $unit) }}{{ fail (printf "config.shutdown.grace: %s is no duration such as 250ms, 20s or 2m" $text) }}{{ end }}
  {{- $milliseconds = add $milliseconds (mul (regexFind "[0-9]+" . | int64) (get $units $unit)) }}
{{- end }}
{{- if not $parts }}{{ fail (printf "config.shutdown.grace: %s is no duration such as 250ms, 20s or 2m" $text) }}{{ end }}
{{- add (div (add $milliseconds 999) 1000) 5 }}
{{- end }}

{{/* For the pod of an application: first it ends, then the relay. */}}
{{- define "whippet.terminationGracePeriodSeconds" -}}
{{- add (include "whippet.graceSeconds" . | int) (.Values.whippet.applicationGraceSeconds | int) }}
{{- end }}

{{/* Whether to make an object of the Prometheus operator: "true" or nothing. Takes (list root enabled). */}}
{{- define "whippet.isWanted" -}}
{{- $root := index . 0 }}
{{- if eq (toString (index . 1)) "auto" }}
  {{- if $root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1" }}true{{ end }}
{{- else if index . 1 }}true{{ end }}
{{- end }}
