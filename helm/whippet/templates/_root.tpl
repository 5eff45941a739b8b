{{/* The library's root: it looks for its values below `whippet`, and here they are the chart's own. Only the
     objects that are looked into come along as they are, so this is set and not returned. */}}
{{- define "relay.enter" -}}
{{- $own := merge (dict "native" false "ingestForOthers" true) (omit .Values "whippet") }}
{{- if and $own.serviceMonitor.enabled (eq (toString $own.podMonitor.enabled) "auto") }}
  {{- $_ := set $own "podMonitor" (set (deepCopy $own.podMonitor) "enabled" false) }}
{{- end }}
{{- $_ := set . "relay" (dict "Values" (dict "whippet" $own) "Release" .Release "Chart" .Chart "Capabilities" .Capabilities "Subcharts" .Subcharts) }}
{{- end }}

{{- define "relay.selector" -}}
app.kubernetes.io/name: whippet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "relay.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ include "whippet.fullname" .relay }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "relay.hasService" -}}
{{- if or .Values.serviceMonitor.enabled (include "whippet.ingestPort" .relay) }}true{{ end }}
{{- end }}
