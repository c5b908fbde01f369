{{/* Names and what the pods of job and server share. */}}

{{- define "eigen.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "eigen.claim" -}}
{{ .Values.checkpoints.existingClaim | default (printf "%s-checkpoints" (include "eigen.name" .)) }}
{{- end }}

{{/* A change of what shapes the checkpoint is another folder: one that exists is taken as it is. */}}
{{- define "eigen.checkpoint" -}}
{{- $shapes := printf "%s %s %s" .Values.model .Values.kvRatio .Values.calibration.flags -}}
/checkpoints/{{ base .Values.model | lower }}-kv{{ .Values.kvRatio }}-{{ sha256sum $shapes | trunc 8 }}
{{- end }}

{{- define "eigen.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-cuda" .Chart.AppVersion) }}
{{- end }}

{{- define "eigen.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "eigen.serverLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "eigen.pod" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  {{- with .Values.podSecurity.runAsUser }}
  runAsUser: {{ . }}
  {{- end }}
  {{- with .Values.podSecurity.fsGroup }}
  fsGroup: {{ . }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "eigen.container" -}}
image: {{ include "eigen.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Of the job; its name has a hash of this. */}}
{{- define "eigen.calibration" -}}
restartPolicy: OnFailure
{{ include "eigen.pod" . }}
containers:
  - name: calibrate
    {{- include "eigen.container" . | nindent 4 }}
    # The image's entry point; no `command`, so that it stays.
    args: [--calibrate-only]
    env:
      - name: EIGEN_MODEL
        value: {{ .Values.model }}
      - name: EIGEN_KV_RATIO
        value: {{ .Values.kvRatio | quote }}
      - name: EIGEN_CALIBRATE_FLAGS
        value: {{ .Values.calibration.flags | quote }}
      - name: EIGEN_CHECKPOINT
        value: {{ include "eigen.checkpoint" . }}
      - name: HOME
        value: /cache
      - name: HF_HOME
        value: /checkpoints/.huggingface
      - name: HF_TOKEN
        valueFrom:
          secretKeyRef: {name: {{ .Values.secret }}, key: hf-token, optional: true}
    resources: {{ toJson .Values.calibration.resources }}
    volumeMounts:
      - {name: checkpoints, mountPath: /checkpoints}
      - {name: scratch, mountPath: /tmp, subPath: tmp}
      - {name: scratch, mountPath: /cache, subPath: cache}
volumes:
  - name: checkpoints
    persistentVolumeClaim: {claimName: {{ include "eigen.claim" . }}}
  - name: scratch
    emptyDir: {}
{{- end }}
